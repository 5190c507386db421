"""The embedded engine: schedule -> run -> account, once a step, in one thread. Small and real; not the product.

Other threads speak to it through `submit`, `abort` and `tell`; it answers through each request's `emit`.
"""

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import count
from queue import SimpleQueue
from typing import Any

import torch

from outrider.lab.engine.blocks import Blocks
from outrider.lab.engine.forward import Forward, Stopped
from outrider.lab.engine.hook import Hook
from outrider.lab.engine.metrics import Meters
from outrider.lab.engine.request import Limits, Output, Request
from outrider.lab.engine.sample import sample
from outrider.lab.engine.scheduler import Chunk, Scheduler
from outrider.lab.engine.text import Text
from outrider.memory import Store


class Engine:
    """`chain` gives the keys of a token list's whole blocks; `connect` reaches memory's Store, None = no memory."""

    def __init__(
        self,
        model: Any,
        decode: Callable[[Sequence[int]], str],
        eos: frozenset[int],
        chain: Callable[[Sequence[int]], list[bytes]],
        limits: Limits,
        connect: Callable[[], Store] | None = None,
    ) -> None:
        self.decode, self.eos, self.limits = decode, eos, limits
        self.blocks = Blocks(limits.kv_tokens // limits.block_tokens, limits.block_tokens)
        self.forward = Forward(model, self.blocks.capacity, limits.block_tokens)
        self.context = min(self.blocks.capacity * limits.block_tokens, model.config.max_position_embeddings)
        self.vocabulary = int(model.config.vocab_size)
        self.scheduler = Scheduler(self.blocks, chain, limits.max_batch_tokens, limits.max_num_seqs)
        self.metrics = Meters(self.blocks, self.scheduler)
        self.inbox: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self.hook = Hook(connect, self.forward, self.scheduler, self.inbox.put) if connect else None
        self.arrivals = count()
        self.texts: dict[Request, Text] = {}  # the open requests
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.failure: str | None = None

    # -- called by other threads

    def start(self) -> None:
        self.thread.start()

    def submit(self, request: Request) -> None:
        """Take a request that fits (len(prompt) + max_tokens <= `context`)."""
        request.born_s = time.monotonic()
        self.inbox.put(lambda: self.arrive(request))

    def abort(self, request: Request) -> None:
        """Forget the request, wherever it is; nothing more is emitted. No effect if it has finished."""
        self.inbox.put(lambda: self.drop(request))

    def stop(self, within_s: float = 0.8) -> None:
        """End the thread, in the middle of a pass if need be."""
        self.forward.stop.set()
        self.inbox.put(lambda: None)
        if self.thread.is_alive():
            self.thread.join(within_s)
        if self.hook:
            self.hook.close()

    # -- the engine's thread

    def run(self) -> None:
        try:
            while not self.forward.stop.is_set():
                busy = self.step()
                while not self.inbox.empty() or not busy:
                    self.inbox.get()()  # sleeps when there is nothing to compute
                    busy = True
        except Stopped:
            return
        except Exception as error:  # a bug, or no memory left: whoever is waiting hears of it, and /health says so
            traceback.print_exc()
            self.failure = f"the engine failed: {type(error).__name__}: {error}"
            while not self.inbox.empty():
                self.inbox.get()()
            for request in self.texts:
                request.emit(Output(self.failure, (), "error"))

    def step(self) -> bool:
        """One pass over what the scheduler chose. False: nothing to compute until a message comes."""
        plan = self.scheduler.schedule()
        self.metrics.preemptions.inc(len(plan.preempted))
        if self.hook:
            for request in plan.preempted:
                self.hook.look_up(request)
            for request in plan.loads:
                self.hook.load(request)
        if not plan.chunks:
            return False
        self.account(plan.chunks, self.forward.run(plan.chunks))
        return True

    def account(self, chunks: Sequence[Chunk], logits: torch.Tensor) -> None:
        """Book the computed tokens, offer full blocks to memory, append what was sampled."""
        ready = []
        for chunk in chunks:
            full = self.scheduler.advance(chunk.request, chunk.count)
            if self.hook:
                self.hook.save(full)
            if chunk.last:
                ready.append(chunk.request)
        for request, token in zip(ready, sample(ready, logits, self.eos), strict=True):
            if request.finish is None:
                self.append(request, token)
            else:
                self.finish(request, "")  # its last token went through the model for its expert choice only

    def append(self, request: Request, token: int) -> None:
        """One more token of the answer: text, stop conditions, news for the caller."""
        request.tokens.append(token)
        self.metrics.sampled(request)
        params, text, done = request.params, self.texts[request], len(request.generated)
        news = text.add([token])
        ended = (token in self.eos and not params.ignore_eos) or token in params.stop_token_ids or text.stopped
        if ended and done >= params.min_tokens:
            request.finish = "stop"
        elif done >= params.max_tokens:
            request.finish = "length"
        if request.finish and not text.stopped:
            news += text.end()
        if request.finish and not params.return_routes:
            self.finish(request, news, (token,))
        else:
            request.emit(Output(news, (token,)))

    def finish(self, request: Request, news: str, tokens: tuple[int, ...] = ()) -> None:
        routes = self.forward.routes_of(request.blocks, request.computed) if request.params.return_routes else None
        self.drop(request)
        self.metrics.finished(request)
        request.emit(Output(news, tokens, request.finish, routes))

    def drop(self, request: Request) -> None:
        """Out of the books. Its whole blocks keep their content; memory learns their chain under the request's id."""
        if request.closed:
            return
        request.closed = True
        del self.texts[request]
        if request in self.scheduler.loading:
            return  # a copy in flight cannot be un-sent (law 4): the hook lets go of its blocks when it has ended
        if self.hook and request.blocks:
            self.hook.remember(request)
        self.scheduler.remove(request)

    def arrive(self, request: Request) -> None:
        request.arrival = next(self.arrivals)
        self.texts[request] = Text(self.decode, request.params.stop)
        self.scheduler.add(request)
        if self.hook:
            self.hook.look_up(request)
