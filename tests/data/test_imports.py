import subprocess
import sys
from pathlib import Path

import data

FOLDER = Path(data.__file__).parent


def test_only_collate_brings_torch_in() -> None:
    modules = sorted(f"data.{path.stem}" for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "collate"))
    assert "data.voc" in modules
    script = (
        f"import sys, {', '.join(modules)}; print([name for name in ('torch', 'torchvision') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=FOLDER.parent, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
