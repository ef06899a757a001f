"""What the example scripts share: data, augmentation, one training loop, metrics, pictures.

What differs per task is in the scripts: the data that is read, the model, the loss, the metric and the picture.
"""
