"""Routing: gates make logits, selections make a ``Routing``, balance losses keep it even."""
