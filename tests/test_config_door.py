"What is typed, what stands in files, and what the command answers: each entry states the value or the sentence."
import json, os, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).parents[1]

def test_help_imports_almost_nothing():
    "`asibkd --help` costs what Python costs: under 0.4 s of CPU, start included"
    code = 'import sys; before = {*sys.modules}\nfrom asibkd.run.cli import main\nmain(["--help"])\n' \
           'print("LOADED", sorted({o.split(".")[0] for o in {*sys.modules} - before}))'
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(root)})
    text, _, loaded = r.stdout.partition('LOADED ')
    assert text.startswith('usage: asibkd COMMAND') and 'asibkd' in loaded, r.stderr
    assert not any(o in loaded for o in ('pydantic', 'yaml', 'argparse', 'logging', 'fastcore', 'torch')), loaded
