import subprocess
import sys
from pathlib import Path

import evaluation

MODULES = sorted(f"evaluation.{path.stem}" for path in Path(evaluation.__path__[0]).glob("[a-z]*.py"))


def test_evaluation_needs_no_torch():
    script = f"import sys, {', '.join(MODULES)}\nprint([m for m in sys.modules if m.startswith(('torch', 'zarr'))])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert len(MODULES) >= 7
    assert done.stdout.strip() == "[]"


def test_scoring_needs_no_drawing_library():
    script = (
        "import sys, evaluation.average_precision, evaluation.detection_files\n"
        "print([m for m in ('matplotlib', 'PIL', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
