"""Batches of fully connected nets, exactly: the sum over examples is taken apart from the last layer to the first.

The last layer gives every example's features and label (`attack.engine.features`), and so the errors e_i at its output.
With them, layer by layer and by least squares alone (`attack.engine.unmixing`), come every example's inputs of each
layer, down to the pictures. Batch size and labels need not be told.

Differs from the papers: R-GAP walks back a batch of one. SPEAR takes batches apart exactly too, but by sampling the
ReLU pattern of one layer; here the softmax of the last layer says more, the patterns follow from what lies above them,
and activations need not be ReLU.

Reference: Zhu and Blaschko, R-GAP, ICLR 2021, arXiv 2010.07733; Dimitrov et al., SPEAR, NeurIPS 2024, arXiv 2403.03945.
"""

from __future__ import annotations

from attack.algorithms.base import Answer
from attack.algorithms.rgap import rgap
from attack.engine.chain import NoChain, trace
from attack.engine.context import Context, Progress
from attack.engine.features import NoFeatures, count_examples, read_batch, reread_features
from attack.engine.film import Film
from attack.engine.target import Target
from attack.engine.unmixing import check_connected, unmix_layers

ATTEMPTS = 4
"""What explains the last layer alone may be other features than the batch's. The layers below then do not fit, and
other draws find others."""


def unmix(target: Target, context: Context) -> Answer:
    """Inputs and labels of the whole batch."""
    examples = target.batch_size
    best, least, reason = None, float("inf"), ""
    try:
        examples = count_examples(target)
        links = trace(target.model, target.input_shape)
        check_connected(links)
        for _ in range(ATTEMPTS):
            features = read_batch(target, context)
            try:
                inputs = unmix_layers(target, links, features)
                # Now that the sides of kinked units are known, no row needs to be left out.
                inputs = unmix_layers(target, links, features, near=inputs)
            except NoChain as error:
                reason = str(error)
                continue
            residual = target.residual(inputs, features.labels)
            if residual < least:
                best, least = (inputs, features), residual
            if residual <= target.tolerance or examples == 1 or not context.seconds_left:
                break
    except (NoFeatures, NoChain) as error:
        reason = str(error)
    if best is None:
        if examples == 1 == target.batch_size:  # the walk back does with less
            return rgap(target, context)
        return Answer(inputs=None, labels=None, reason=reason)
    inputs, features = best
    film = Film()
    film.take(0, least, inputs)
    context.progress(Progress(method="unmix", evaluations=1, residual=least, seconds_left=context.seconds_left))
    return Answer(
        inputs=inputs,
        labels=features.labels,
        film=film,
        again=lambda moved: (unmix_layers(one, links, reread_features(one, features), near=inputs) for one in moved),
        batch_size_read=target.batch_size_assumed,
        evaluations=1,
    )
