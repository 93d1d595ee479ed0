"""The likeliest of the distinct answers to a question by Eq. 2, read no further than it takes to know which it is.

A prompt's own answer has the probability it was decoded with. Another's is no likelier than its tokens read so far; of the first one every
prompt has told that already. The answer that is likeliest by those prompts alone that said it is read whole, for mostly it is the likeliest
(28 and 31 of 36 questions of nq_wiki, untuned); the others are read until they are out of the question.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from radit_jax.data import trees

LOOK = 5  # tokens that are read of all answers but one at first,
FEW = 24  # unless all answers together have so few
MORE = 2  # tokens past those after which an answer should be out of the question, if it goes on as it began
NEARLY = 0.9  # of an answer is all of it: what is left would be another call
ROUNDING = 1e-3  # nats by which two ways of computing a log-probability may differ


def mixed(logp_xKxC: np.ndarray, logw_xK: np.ndarray) -> np.ndarray:
    """Eq. 2 for each candidate, (…, C): log Σ_k w_k p_k."""
    return np.logaddexp.reduce(logp_xKxC + logw_xK[..., None], axis=-2)


class Contest:
    """The distinct answers to one question (C, token ids) and what is known of log p(answer and its end | prompt).

    `own_ids` and `own_K` are what each prompt said and how probable that was to it, `first_KxC` log p of every answer's first token under
    every prompt (of the end, for the answer without tokens), `logw_K` the log-weights of the prompts.
    """

    def __init__(
        self,
        answers: Sequence[list[int]],
        own_ids: Sequence[list[int]],
        own_K: np.ndarray,
        first_KxC: np.ndarray,
        logw_K: np.ndarray,
    ):
        self.answers, self.logw_K = answers, logw_K
        own_KxC = np.asarray([[ids == own for ids in answers] for own in own_ids])
        self.upper_KxC = np.where(own_KxC, own_K[:, None], first_KxC)
        self.known_KxC = own_KxC | np.asarray([not ids for ids in answers])
        self.read_C = np.ones(len(answers), int)  # tokens that the bounds are of

    def to_read(self) -> dict[int, int]:
        """Which answers are to be read under all prompts, and how many tokens of each, from the first; none when the best is known."""
        least_C, most_C = mixed(np.where(self.known_KxC, self.upper_KxC, -np.inf), self.logw_K), mixed(self.upper_KxC, self.logw_K)
        likeliest = int(np.argmax(least_C))
        may_be_C = (most_C >= least_C[likeliest] - ROUNDING) & ~self.known_KxC.all(axis=0)
        whole = {int(c): len(self.answers[c]) for c in np.flatnonzero(may_be_C)}
        if trees.total(trees.grow([self.answers[c] for c in whole], worth=1)) <= FEW:
            return whole
        if not (self.read_C > 1).any():  # the first look
            until = dict.fromkeys(whole, LOOK) | {likeliest: np.inf}
        else:
            until = {c: self._falls(c, most_C[c], least_C[likeliest]) for c in whole}
        return {c: int(until[c]) if until[c] < NEARLY * count else count for c, count in whole.items()}

    def hear(self, tokens: dict[int, int], logp_KxC: np.ndarray) -> None:
        """log p of what `to_read` asked for, in its order: of an answer read whole, with its end."""
        for (c, count), logp_K in zip(tokens.items(), logp_KxC.T):
            self.upper_KxC[:, c] = np.where(self.known_KxC[:, c], self.upper_KxC[:, c], logp_K)
            self.known_KxC[:, c] |= count == len(self.answers[c])
            self.read_C[c] = count

    def best(self) -> tuple[int, float]:
        """Which it is, and its log-probability. What is not known is below it by its upper bound."""
        mixed_C = np.where(self.known_KxC.all(axis=0), mixed(self.upper_KxC, self.logw_K), -np.inf)
        best = int(np.argmax(mixed_C))
        return best, float(mixed_C[best])

    def _falls(self, c: int, most: float, least: float) -> float:
        """Tokens after which this answer is less likely than the best is known to be, if the rest of it is as likely as what was read."""
        of_a_token = max(-most / self.read_C[c], 1e-3)
        return self.read_C[c] + MORE + (most - least) / of_a_token
