"""``python -m lm_eval_softverb …``: lm_eval's own command line with our models and tasks, without any start-up hook."""

from __future__ import annotations

import sys

from lm_eval_softverb.cli import require_lm_eval
from lm_eval_softverb.errors import SoftverbError
from lm_eval_softverb.plugin import register


def main() -> None:
    """Register, then run lm_eval's command line on the same arguments."""
    try:
        require_lm_eval()
        register()
    except SoftverbError as error:
        sys.exit(str(error))
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
