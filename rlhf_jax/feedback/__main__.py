import sys, tyro
from rlhf_jax.feedback.commands import serve

assert sys.argv.pop(1) == "serve"
serve.run(tyro.cli(serve.Serve))
