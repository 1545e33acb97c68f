"""``moesaic export``: a trained model as a graph for onnxruntime, ``torch.export`` or AOTInductor.

The command: ``options`` (its line), ``command`` (the whole, and its files). The formats: ``onnx``, ``standard``,
``contrib`` and ``programs``.
"""
