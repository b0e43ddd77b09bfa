"""Detection mathematics as pure functions on tensors: `boxes`, `losses`, `nms`. Usable without the rest."""
