"""What a reader touches: the demo, the step through a caption, an explorer of datasets, and a game
against the model.

All of it is ipywidgets' own parts, versions 7 and 8, so it works in JupyterLab, Colab, Kaggle and
Voilà alike.
"""

from capgen_utils.show.widgets.app import Demo, demo, find_bundles, read_upload
from capgen_utils.show.widgets.play import BeatTheModel, Explorer, beat_the_model, beside, explorer
from capgen_utils.show.widgets.steps import Steps, step_through

__all__ = [
    "BeatTheModel",
    "Demo",
    "Explorer",
    "Steps",
    "beat_the_model",
    "beside",
    "demo",
    "explorer",
    "find_bundles",
    "read_upload",
    "step_through",
]
