"""What autograd keeps between forward and backward."""

import torch


class Saved:
    """Collects the tensors that autograd saves, without what belongs to the model, once per storage."""

    def __init__(self, model):
        self.own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.storages = {}
        self.shapes = []

    def __enter__(self):
        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.own:
                self.storages[storage.data_ptr()] = storage.nbytes()
                self.shapes.append(tuple(tensor.shape))
            return tensor

        self.context = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self.context.__enter__()
        return self

    def __exit__(self, *error):
        self.context.__exit__(*error)

    @property
    def bytes(self):
        return sum(self.storages.values())
