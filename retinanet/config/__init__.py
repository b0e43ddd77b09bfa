"""Configuration: the keys (`defaults.py`), files and command line (`load.py`), rules (`check.py`), batch recipe."""

from retinanet.config.check import check_config
from retinanet.config.defaults import get_cfg
from retinanet.config.load import dump_config, load_config
from retinanet.config.recipe import batch_recipe

__all__ = ["batch_recipe", "check_config", "dump_config", "get_cfg", "load_config"]
