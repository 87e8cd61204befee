"""Stands in for frontend/template_child.py where the system kills every such process."""

import os
import signal
import sys

sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
