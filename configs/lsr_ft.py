"""Retriever fine-tuning (R-ft, paper section 2.3, Eqs. 4 and 5): the retriever learns from stored LM scores.

    python launch/train.py --config=configs/lsr_ft.py --workdir=runs/lsr_ft

Variants: invented (default), nq_wiki, pubmed_qa, dragon_plus (the paper's numbers).
"""

from configs import common


def get_config(variant: str = "invented"):
    c = common.variant(common.base(), variant)
    c.goal = "lsr_ft"
    return c.lock()
