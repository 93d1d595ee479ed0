"""LM fine-tuning (LM-ft, paper section 2.2, Eq. 3).

    python launch/train.py --config=configs/lm_ft.py --workdir=runs/lm_ft

Variants: invented (default), nq_wiki, llama_65b (the paper's numbers).
"""

from configs import common


def get_config(variant: str = "invented"):
    c = common.variant(common.base(), variant)
    c.goal = "lm_ft"
    return c.lock()
