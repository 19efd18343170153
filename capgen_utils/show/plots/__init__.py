"""Figures in one style: photographs, charts, learning curves and attention. All notebooks use them.

Every function returns a matplotlib ``Figure`` that is independent of pyplot's windows and state;
``alt`` shows it in a notebook with an alternative text.
"""

from capgen_utils.show.plots.charts import (
    bars,
    interval_bars,
    learning_curves,
    length_histogram,
    read_log,
    word_frequencies,
)
from capgen_utils.show.plots.photographs import (
    attention_layers,
    attention_panel,
    attention_step,
    best_and_worst,
    caption_similarity,
    draw_grid,
    embedding_map,
    overlay,
    scale_top,
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
from capgen_utils.vision.preprocessing import grid_side, upsample
