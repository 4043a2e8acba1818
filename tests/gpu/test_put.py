"""A pass of PUT in a CUDA graph: captured once, replayed for other images."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import inpaintrt as irt
from inpaintrt import models
from inpaintrt.models.put import PUT
from inpaintrt.models.put_codec import PVQVAE
from inpaintrt.models.put_sampling import Tokens
from inpaintrt.testing import recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: not run")

GRID, CLASSES, MANY = (8, 8), 64, 7


def network(generation: str) -> PUT:
    codec = PVQVAE(codes=96, split=CLASSES, width=32, channels=48, outputs=40, blocks=3, decoder_channels=48)
    made = models.create("put", codec=codec, generation=generation, grid=GRID, layers=2, width=64, heads=4)
    return recipe.fill(made.eval()).cuda()  # type: ignore[no-any-return]


def started(model: PUT, tag: str) -> Tokens:
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool, device="cuda")
    mask[:, :, 10:40, 20:60] = False
    return model.begin((recipe.image(tag, 1, 3, 64, 64) * 255).cuda(), mask)


def tensors(state: Tokens) -> list[Tensor]:
    return [getattr(state, field.name) for field in dataclasses.fields(state)]


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("generation", ["cvpr", "tpami"])
def test_a_pass_is_captured_and_replayed(generation: str, accelerated: bool) -> None:
    model = network(generation)
    if accelerated:
        irt.accelerate(model)
    held, drawn = started(model, "put_a"), torch.empty(1, MANY, CLASSES, device="cuda").exponential_()
    unknown = int((~held.known).sum())

    def step(state: Tokens) -> None:
        model.step(state, drawn, number=1, many=MANY, unknown=unknown, keep=20)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a first call makes must not be part of the graph
        step(started(model, "put_a"))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(held)
    for tag in ("put_b", "put_c"):
        expected, given = started(model, tag), started(model, tag)
        drawn.exponential_()
        step(expected)
        for place, tensor in zip(tensors(held), tensors(given), strict=True):
            place.copy_(tensor)
        graph.replay()
        assert int((held.order == 1).sum()) == MANY
        assert torch.equal(held.codes, expected.codes)
        assert torch.equal(held.order, expected.order)
        torch.testing.assert_close(held.embedded, expected.embedded)
