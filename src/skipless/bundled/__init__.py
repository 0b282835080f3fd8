"""What comes with the package: a small trained model, and the configurations of well-known ones. Data alone."""

from pathlib import Path

# A model folder.
BUNDLED = Path(__file__).parent / "stdlib"
# Its date; models: name -> config fields; hub: name -> what model hubs call it.
KNOWN = Path(__file__).parent / "models.json"
