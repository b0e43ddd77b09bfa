"""The largest values of keys. Above them is a slip of the hand that would end in an overflow, without memory, or never.

They lie far above what anybody trains with: they say what cannot work, not what is wise.
"""

from collections.abc import Iterator

from retinanet.config.keys import all_keys, get_key

LIMITS = (
    (16, ("INPUT.AUGMENT.LSJ", "TEST.AUG.SCALES")),
    (100, ("MODEL.HEAD.NUM_CONVS", "MODEL.ANCHORS.SCALES_PER_OCTAVE", "MODEL.LOSS.GAMMA")),
    (1000, ("DATALOADER.NUM_WORKERS",)),
    (2**13, ("MODEL.FPN.CHANNELS", "MODEL.NORM_OPTIONS.GN.GROUPS", "MODEL.NORM_OPTIONS.BCN.GROUPS")),
    (2**15, (
        "INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TRAIN", "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST",
        "INPUT.SIZE_DIVISIBILITY",
    )),
    (2**16, ("SOLVER.IMS_PER_BATCH", "SOLVER.ACCUMULATE", "TEST.IMS_PER_BATCH")),
    (2**20, ("MODEL.NUM_CLASSES", "MODEL.NORM_OPTIONS.MABN.SIMULATED_BATCH")),
    (2**32 - 1, ("SEED",)),
)  # fmt: skip
MOST = 10**9  # of every other number


def beyond_limits(cfg) -> Iterator[str]:
    """Yield a message for each number above its limit; of a list every item counts."""
    limits = {key: limit for limit, keys in LIMITS for key in keys}
    for key in all_keys(cfg):
        value, limit = get_key(cfg, key), limits.get(key, MOST)
        items = value if isinstance(value, (tuple, list)) else [value]
        if any(isinstance(item, (int, float)) and item > limit for item in items):
            yield f"{key}: {value} has to be at most {limit:,}"
