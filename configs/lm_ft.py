"""LM fine-tuning (LM-ft, paper section 2.2, Eq. 3).

    python launch/train.py --config=configs/lm_ft.py --workdir=runs/lm_ft

Variants: invented (default), nq_wiki, pubmed_qa, multi_task, few_shot, and the paper's numbers: llama_7b, llama_13b, llama_65b.
"""

from configs import common


def get_config(variant: str = "invented"):
    c = common.variant(common.base(), variant)
    c.goal = "lm_ft"
    return c.lock()
