"""Figures in one style: photographs, charts, learning curves, and where a captioner looks.

Every function returns a matplotlib ``Figure`` that no window and no global state knows of; ``alt``
shows it in a notebook together with a text for those who cannot see it.
"""

from capgen_utils.show.plots.charts import (
    bars,
    interval_bars,
    learning_curves,
    length_histogram,
    read_log,
    word_frequencies,
)
from capgen_utils.show.plots.looks import (
    attention_layers,
    attention_panel,
    attention_step,
    overlay,
    scale_top,
)
from capgen_utils.show.plots.photographs import (
    best_and_worst,
    caption_similarity,
    draw_grid,
    embedding_map,
    show_images,
    similarity_matrix,
)
from capgen_utils.show.plots.style import (
    COLOUR_MAP,
    DPI,
    HEAT,
    LARGE,
    PALETTE,
    STYLE,
    alt,
    new_figure,
    rendered,
    show_source,
    use_style,
)
from capgen_utils.vision.grid import grid_side, upsample

__all__ = [
    "COLOUR_MAP",
    "DPI",
    "HEAT",
    "LARGE",
    "PALETTE",
    "STYLE",
    "alt",
    "attention_layers",
    "attention_panel",
    "attention_step",
    "bars",
    "best_and_worst",
    "caption_similarity",
    "draw_grid",
    "embedding_map",
    "grid_side",
    "interval_bars",
    "learning_curves",
    "length_histogram",
    "new_figure",
    "overlay",
    "read_log",
    "rendered",
    "scale_top",
    "show_images",
    "show_source",
    "similarity_matrix",
    "upsample",
    "use_style",
    "word_frequencies",
]
