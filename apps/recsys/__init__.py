"""Recommenders: tables of users, items and several labels, and histories of clicks."""

import logging

# When TorchRec is imported it asks torch.fx a question that is answered with a note on torch's own names.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
