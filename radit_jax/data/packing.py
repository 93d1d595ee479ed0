"""Instances packed to the row length (paper section 2.2 and appendix): several per row, each attending only within itself.

Grain packs (best fit into a few open rows, iterator state for checkpoints); this file says what is packed and how a packed row becomes
an LmBatch.
"""

from __future__ import annotations

from collections.abc import Mapping

import grain
import numpy as np
from grain.experimental import BestFitPackIterDataset

from radit_jax.errors import InputError
from radit_jax.types import Instance, LmBatch

OPEN_ROWS = 16  # rows that grain fills at once; more pack tighter and hold more instances back


def features(instance: Instance, index: int, row_length: int, output_slots: int) -> dict[str, np.ndarray]:
    """What of an instance is packed: its tokens, and for each output token its label and the position before it."""
    start, length = instance.target_start, len(instance.tokens_T)
    outputs = length - start
    if not (0 < start and 0 < outputs <= output_slots and length <= row_length):
        raise InputError(
            f"{instance.id}: {start} prompt and {outputs} output tokens do not fit a row of {row_length} tokens "
            f"with {output_slots} output slots"
        )
    return {
        "tokens": instance.tokens_T.astype(np.int32),
        "slots": np.arange(start - 1, length - 1, dtype=np.int32),
        "labels": instance.tokens_T[start:].astype(np.int32),
        "index": np.asarray([index + 1], np.int32),  # 0 is "none"
    }


def pack(instances: grain.MapDataset, *, row_length: int, output_slots: int, rows: int, seed: int) -> grain.IterDataset:
    """Packs a data set of `features` into batches of `rows` rows: yields (LmBatch of numpy arrays, instance numbers)."""
    lengths = {"tokens": row_length, "slots": output_slots, "labels": output_slots, "index": output_slots}
    packed = BestFitPackIterDataset(
        instances.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=64)),
        length_struct=lengths,
        num_packing_bins=OPEN_ROWS,
        seed=seed,
    )
    return packed.batch(rows, drop_remainder=True).map(lm_batch)


def reach(batch: LmBatch) -> int | None:
    """A power of two that no instance is longer than, where rows have four times that length, for a program that knows it; else None.

    It is then half of attention's work, or less, on a CPU (attention.attend_within). Shorter rows gain too little for a program more.
    """
    longest = int(np.max(batch.positions_BxT)) + 1
    power = 1 << (longest - 1).bit_length()
    return power if 4 * power <= batch.positions_BxT.shape[-1] else None


def lm_batch(packed: Mapping[str, np.ndarray]) -> tuple[LmBatch, np.ndarray]:
    """Packed features (each rows × length) → (LmBatch, numbers of the instances in it)."""
    segments_BxT, slot_segments_BxP = packed["tokens_segment_ids"], packed["slots_segment_ids"]
    # Slots were counted from the start of their instance; add where that instance starts in the row.
    starts_BxS = np.stack([(segments_BxT == s).argmax(-1) for s in range(1, slot_segments_BxP.max(initial=1) + 1)], -1)
    offsets_BxP = np.take_along_axis(starts_BxS, np.maximum(slot_segments_BxP - 1, 0), axis=-1)
    real_BxP = slot_segments_BxP > 0
    batch = LmBatch(
        tokens_BxT=packed["tokens"].astype(np.int32),
        positions_BxT=packed["tokens_positions"].astype(np.int32),
        segment_ids_BxT=segments_BxT.astype(np.int32),
        slots_BxP=np.where(real_BxP, packed["slots"] + offsets_BxP, 0).astype(np.int32),
        labels_BxP=packed["labels"].astype(np.int32),
        weights_BxP=real_BxP.astype(np.float32),
    )
    index = packed["index"].reshape(-1)
    return batch, index[index > 0] - 1
