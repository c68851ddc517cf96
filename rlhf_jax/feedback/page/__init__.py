"""The labelling page: people compare, rank and rate completions of a comparison store in a browser.

Requires the extra ``rlhf_jax[feedback]``.
"""

from rlhf_jax.feedback.page.labeling_app import make_app
from rlhf_jax.feedback.page.page_options import INSTRUCTIONS, LOOPBACK, Options
from rlhf_jax.feedback.page.web_server import listen, serve

__all__ = ["INSTRUCTIONS", "LOOPBACK", "Options", "listen", "make_app", "serve"]
