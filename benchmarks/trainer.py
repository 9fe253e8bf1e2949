"""Optimizer steps as a training makes them, eagerly or from a CUDA graph."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

SEED = 42


class Trainer:
    """One model with its optimizer; every step meets the same adapters and the same tokens."""

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        vocab: int,
        rows: int,
        length: int,
        *,
        graphs: bool = False,
    ) -> None:
        self.model, self.device, self.graphs = model, device, graphs
        self._rows, self._length, self._vocab = rows, length, vocab
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=0.0)

    def batches(self, tokens: int) -> list[Tensor]:
        """Micro-batches of one step, as large as the options allow."""
        length = min(self._length, tokens)
        rows = min(self._rows, max(1, tokens // length))
        generator = torch.Generator().manual_seed(SEED)
        ids = [
            torch.randint(self._vocab, (rows, length), generator=generator)
            for _ in range(max(1, tokens // (rows * length)))
        ]
        return [batch.to(self.device) for batch in ids]

    def step(
        self,
        batches: Sequence[Tensor],
        noise: AbstractContextManager[None],
        graph: "Graph | None" = None,
    ) -> Tensor:
        """One optimizer step; its loss and its gradient norm, which the host does not wait for."""
        with noise:
            loss = self.passes(batches) if graph is None else graph.replay()
        norm = nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        if graph is None:  # a graph writes its gradients anew
            self._optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss, norm])

    def passes(self, batches: Sequence[Tensor]) -> Tensor:
        """Forward and backward passes of all micro-batches; their loss."""
        losses = []
        for ids in batches:
            with torch.autocast(
                self.device.type,
                torch.bfloat16,
                enabled=self.device.type == "cuda",
                cache_enabled=not self.graphs,  # what a graph reads must not be freed
            ):
                loss = self.model(input_ids=ids, labels=ids).loss / len(batches)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def forget(self) -> None:
        """Let the gradients go."""
        self._optimizer.zero_grad(set_to_none=True)


class Graph:
    """The passes of one step, captured; noise must be on while they are."""

    def __init__(self, trainer: Trainer, batches: Sequence[Tensor]) -> None:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                trainer.passes(batches[:1])  # the others are alike
        torch.cuda.current_stream().wait_stream(side)
        trainer.forget()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = trainer.passes(batches)

    def replay(self) -> Tensor:
        """Run the passes with the noise of the present step."""
        self._graph.replay()
        return self._loss.clone()
