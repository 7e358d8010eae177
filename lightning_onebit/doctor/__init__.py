"""``python -m lightning_onebit doctor``: what a step takes under each way to average gradients, predicted from probes.

``cost_model`` knows numbers only; ``links`` writes a network down, ``probe`` measures one; ``advice`` says what to use.
"""
