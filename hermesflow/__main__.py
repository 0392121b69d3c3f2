"""`python -P -m hermesflow`, the same as the `hermesflow` command."""

import os
import sys

from hermesflow.cli import main

if __name__ == "__main__":
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # FSDP keeps gloo's threads alive, and one that is just letting go of a tensor would abort the process when the
        # interpreter is taken down: torchrun would call a run that has ended well a failure.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
