"""LightningCLI for the small GPT of the demo. Everything, the strategy included, is set on the command line or in YAML:

pip install "jsonargparse[signatures]"
python examples/cli.py fit --config examples/config.yaml
python examples/cli.py fit --config examples/config.yaml --trainer.strategy.init_args.block_size 1024
python examples/cli.py fit --trainer.strategy.help lightning_onebit.OneBitDDPStrategy
"""

from gpt_stdlib import GPT, StdlibSources
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningCLI

import lightning_onebit  # noqa: F401  # registers "onebit_ddp", so that `--trainer.strategy onebit_ddp` works, too

# Fields of dataclasses, such as those of VarianceStability, carry their documentation themselves: show it in --help.
set_parsing_settings(docstring_parse_attribute_docstrings=True)

if __name__ == "__main__":
    LightningCLI(GPT, StdlibSources)
