"""For ms-swift: `--external_plugins` with the path of this file, which `peft-moe-compat plugin ms-swift` prints.

To be imported by its path is enough: that activates the library, unless `PEFT_MOE_COMPAT=0` is in the environment.
"""

import peft_moe_compat  # noqa: F401
