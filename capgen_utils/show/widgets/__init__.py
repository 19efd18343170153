"""Widgets: the demo, the step through a caption, a dataset explorer and a game. See notebook 11.

They use only ipywidgets, version 7 or 8, and so work in JupyterLab, Colab, Kaggle and Voilà alike.
"""

from capgen_utils.show.widgets.app import (
    Demo,
    Steps,
    demo,
    find_bundles,
    read_upload,
    step_through,
)
from capgen_utils.show.widgets.parts import guarded
from capgen_utils.show.widgets.play import BeatTheModel, Explorer, beside
