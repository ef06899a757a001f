"""What the example scripts share: data, augmentation, one training loop, metrics, pictures.

What differs per task is in the scripts: the data that is read, the model, the loss, the metric and the picture.
"""

from importlib.util import find_spec

# What the scripts import beside the requirements of sfa_peft itself. Checked here, before anything imports it.
EXTRAS = ("datasets", "evaluate", "jinja2", "kornia", "matplotlib", "PIL", "pycocotools", "scipy")
INSTALL = 'pip install "sfa-peft[examples]"'

if missing := [name for name in EXTRAS if find_spec(name) is None]:
    raise SystemExit(f"the examples need {', '.join(missing)}: {INSTALL}")
