"""The `millpond` command and the entry points of the daemons.

The one check that has to come before everything else: older Pythons cannot read our modules.
"""

import sys

PYTHON_MIN = (3, 11)

if sys.version_info[:2] < PYTHON_MIN:
    sys.exit(
        "millpond: error: Python {}.{} or newer is needed, found {}.{}".format(
            *PYTHON_MIN, *sys.version_info[:2]
        )
    )
