"""RetinaNet training where the normalization is one config key. `retinanet.load` is the way in for prediction."""


def load(config_or_checkpoint, weights=None, device="auto"):
    """Return a `retinanet.engine.detector.Detector`; see `load` there. PyTorch is imported by the first call."""
    from retinanet.engine.detector import load as load_detector

    return load_detector(config_or_checkpoint, weights, device)
