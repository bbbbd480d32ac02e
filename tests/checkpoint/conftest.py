import sys
from pathlib import Path

# The transformers models are shared with the model tests.
sys.path.insert(0, str(Path(__file__).parent.parent / "model"))
