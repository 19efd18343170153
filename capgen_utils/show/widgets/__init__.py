"""Widgets: the demo, the step through a caption, a dataset explorer and a game. See notebook 11.

They use only ipywidgets, version 7 or 8, and so work in JupyterLab, Colab, Kaggle and Voilà alike.
"""

from capgen_utils.show.widgets.app import Demo, demo, find_bundles, read_upload
from capgen_utils.show.widgets.play import BeatTheModel, Explorer, beside
from capgen_utils.show.widgets.steps import Steps, step_through
