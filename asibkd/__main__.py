"`python -m asibkd` is the `asibkd` command"
from asibkd.run.cli import main

raise SystemExit(main())
