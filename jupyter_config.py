"""For `jupyter lab --config=jupyter_config.py`, which `make lab` is, and for `jupyter nbconvert --config=jupyter_config.py --to html`."""

from nbdev.clean import clean_nb

c = get_config()  # noqa: F821, Jupyter gives it to its configuration files


def clean(path: str, model: dict, **_) -> None:
    "Notebooks of nbs/ are saved without outputs and counters, so that a diff shows what was written."
    if model["type"] != "notebook" or not path.strip("/").startswith("nbs/"): return
    for cell in model["content"]["cells"]:
        if "outputs" in cell: cell["outputs"] = []
    clean_nb(model["content"], allowed_cell_metadata_keys=["tags"])


c.FileContentsManager.pre_save_hook = clean

c.ExecutePreprocessor.store_widget_state = False

# In exported notebooks, what widgets leave as HTML comes before what would need a running Python.
c.NbConvertBase.display_data_priority = ["text/html", "image/svg+xml", "image/png", "image/jpeg", "text/markdown", "text/plain"]
