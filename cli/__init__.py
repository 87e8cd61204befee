"""The `drover` command.

Drover's folders have common names. An empty entry in PYTHONPATH stands for the working directory,
and a `client.py` there would take the place of ours. So Drover's root comes first.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
