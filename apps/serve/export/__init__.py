"""``moesaic export``: a trained model as a graph for onnxruntime, ``torch.export`` or AOTInductor."""
