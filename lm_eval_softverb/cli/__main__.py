"""``python -m lm_eval_softverb.cli`` is ``softverb``."""

from lm_eval_softverb.cli import main

raise SystemExit(main())
