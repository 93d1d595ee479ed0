"""RA-DIT from corpus to table: no retrieval · neither tuned · R-ft only · LM-ft only · both.

    python launch/train.py --config=configs/radit.py --workdir=runs/demo                     (make demo)
    python launch/train.py --config=configs/radit.py:nq_wiki --workdir=runs/nq_wiki
    python launch/train.py --config=configs/radit.py:own --workdir=runs/mine --config.corpus.source=FOLDER     (docs/your_data.md)

Expected score, time and memory of both stand in the README beside their commands.
"""

from configs import common


def get_config(variant: str = "invented"):
    c = common.variant(common.base(), variant)
    c.goal = "radit"
    return c.lock()
