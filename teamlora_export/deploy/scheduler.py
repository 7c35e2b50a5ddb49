"""Many texts from one model at once, batched continuously: a request joins when it comes and leaves when it is done.

    with Scheduler(open_slots(Session(folder), 8)) as scheduler:
        for token in scheduler.submit(prompt_ids, count=64, sampling=Sampling(temperature=0.7)):
            print(token.id)

The model's cache has a row for each text at work. A turn of the scheduler

1. ends what was cancelled or is late,
2. runs one step for all texts that are being written, whatever their lengths,
3. gives free rows to those that wait, and reads prompts, so many tokens of them that no text waits long for its next
   token; short prompts that wait together share a call.

A request fails alone: rows of a batch do not see one another, a step that fails is tried again for each row by itself,
and a row that is left is cleared. One whose adapter is being read waits, and those behind it do not. Where the model
cannot be run any more (`health.py`), all requests fail, and no more are taken.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING or __package__:
    from teamlora_export.deploy.adapter_slots import Shelved
    from teamlora_export.deploy.answers import Answer, Broken, Failed, Overloaded, Token
    from teamlora_export.deploy.failure import DeviceError, ModelError, brief
    from teamlora_export.deploy.health import Health
    from teamlora_export.deploy.sampling import GREEDY, Sampler, Sampling, log_probability
    from teamlora_export.deploy.slots import Slots
else:
    # Deployed: the files lie beside one another.
    from adapter_slots import Shelved
    from answers import Answer, Broken, Failed, Overloaded, Token
    from failure import DeviceError, ModelError, brief
    from health import Health
    from sampling import GREEDY, Sampler, Sampling, log_probability
    from slots import Slots


# Tokens whose computation takes about as long as a call takes beside its tokens, for reading all weights.
_CALL = 16
# Seconds that requests which find nothing at work wait for the next: those that come at one moment share a call.
_MOMENT, _MOMENTS = 0.003, 8
# Seconds after which it is asked again whether an adapter is there, or there is room for one.
_AGAIN = 0.001
# Seconds after which a request fails that finds others' adapters in all slots, where no text goes on meanwhile: streams
# may have been left in the middle. More than the longest call takes.
_PATIENCE = 300.0


@dataclass(eq=False)
class _Request:
    """One that waits, or whose prompt is read, or whose text is written.

    Attributes:
        unread: of the prompt; when all is read, the one token that the next step reads.
        left: tokens that may follow. stops: ids that end the text.
        row: of the cache. adapter: as its name was understood when the request came.
    """

    unread: list[int]
    left: int
    stops: Collection[int]
    sampler: Sampler
    log_probabilities: bool
    abandoned: Callable[[], bool] | None
    answer: Answer
    row: int = -1
    adapter: Shelved | None = None


class Scheduler:
    """Shares a model among requests; see the module's own words.

    Args:
        waiting: requests that may wait for a row; more are refused.
        reading: tokens of prompts that are read in a turn; None: as many as one row reads in a call.
        clock: in seconds.
    """

    def __init__(
        self,
        model: Slots,
        waiting: int = 64,
        reading: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if waiting < 1:
            raise ModelError(f"{waiting} waiting requests: give at least 1.")
        self._model, self._clock, self._most_waiting = model, clock, waiting
        self._health = Health(model)
        self._most_read = reading or model.part
        self._waiting: deque[_Request] = deque()
        # In a row from the last down, in turns.
        self._reading: deque[_Request] = deque()
        # Each in the row of its index.
        self._writing: list[_Request] = []
        self._changed = threading.Condition()
        self._closing = False
        # When requests were first found to have no slot, where nothing is at work here.
        self._full_since: float | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Scheduler:
        """A thread of its own answers requests from now on.

        Raises:
            ModelError: the model cannot be run.
        """
        self._health.require_runs()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Requests that are not done fail."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        self._close()

    def submit(
        self,
        prompt: Sequence[int],
        count: int = 64,
        sampling: Sampling = GREEDY,
        *,
        stops: Collection[int] | None = None,
        log_probabilities: bool = False,
        seconds: float = float("inf"),
        abandoned: Callable[[], bool] | None = None,
        adapter: str | None = None,
    ) -> Answer:
        """Up to `count` tokens after a prompt (token ids), until an end-of-text token, or until there is no more room.

        Args:
            stops: the ids that end a text; None: the model's.
            seconds: the answer fails when it is not complete by then.
            abandoned: whether nobody wants the answer any more; asked at every turn, by the scheduler's thread.
            adapter: by name; None: the model without one, or with the one of its own. What the name stands for now is
                what the whole answer comes from, whatever it stands for later.

        Raises:
            ModelError: the prompt is empty, too long, or holds what is no token's id; or there is no such adapter.
            Overloaded: too many requests wait.
            Broken: the model cannot be run any more.
        """
        prompt = self._model.settings.require_ids(prompt)
        count = self._model.settings.room([prompt], count)
        if not seconds > 0:
            raise ModelError(f"A time limit of {seconds} seconds: give a number above 0.")
        sampler, answer = Sampler(sampling, prompt), Answer(self._clock() + seconds, self._clock)
        stops = self._model.settings.stops if stops is None else stops
        request = _Request(prompt, count, stops, sampler, log_probabilities, abandoned, answer)
        request.adapter = self._model.find_adapter(adapter)
        with self._changed:
            if broken := self.broken:
                raise Broken(broken)
            if self._closing:
                raise Overloaded("The server is closing.")
            # Some of those that wait may have rows already at the next turn.
            beyond = len(self._waiting) + len(self._reading) + len(self._writing) - self._model.slots
            if beyond >= self._most_waiting:
                raise Overloaded(f"{beyond} requests wait already. Try again later.")
            self._waiting.append(request)
            self._changed.notify()
        return answer

    @property
    def broken(self) -> str:
        """Why the model cannot be run any more: known before the first request ends of it. Empty: it can."""
        if self._thread is not None and not (self._closing or self._thread.is_alive()):
            return "The scheduler's thread has died. Start its process again."
        return self._health.broken

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._reading or self._writing)

    def turn(self) -> None:
        """See the module's own words. Called by the scheduler's own thread, unless that was never started."""
        try:
            self._drop()
            if self._writing:
                self._read_together(self._writing)
            self._read_prompts()
        except Broken as broken:
            self._end_all(Failed(str(broken)))

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self.busy:
                    self._wait_for_first()
                if self._closing:
                    break
            try:
                self.turn()
            except Exception as error:
                # None is known. Those at work may be spoilt by it; those that come are not.
                self._end_all(Failed(f"The scheduler failed ({brief(error)})."))
        self._close()

    def _wait_for_first(self) -> None:
        """Until there are requests, as many as come at one moment. Called with the lock."""
        self._changed.wait_for(lambda: self._closing or self.busy)
        come, until = 0, time.monotonic() + _MOMENTS * _MOMENT
        while not self._closing and come < len(self._waiting) < self._model.slots and time.monotonic() < until:
            come = len(self._waiting)
            self._changed.wait(_MOMENT)

    def _drop(self) -> None:
        for request in (*self._writing, *self._reading):
            if (reason := self._reason_to_end(request)) is not None:
                self._retire(request, reason)
        with self._changed:
            waiting = list(self._waiting)
        for request in waiting:
            if (reason := self._reason_to_end(request)) is not None:
                self._leave_queue(request)
                self._model.release(request.adapter)
                request.answer.end(reason)

    def _reason_to_end(self, request: _Request) -> str | Exception | None:
        try:
            if request.answer.cancelled or (request.abandoned is not None and request.abandoned()):
                return "cancelled"
        except Exception as error:
            return Failed(f"Whether the request is still wanted cannot be told ({brief(error)}).")
        return request.answer.overdue()

    def _admit(self) -> bool:
        """Free rows to those that wait; whether there are prompts to be read."""
        free = set(range(self._model.slots)) - {request.row for request in (*self._writing, *self._reading)}
        with self._changed:
            waiting = list(self._waiting)
        full: list[_Request] = []
        is_loading = False
        for place, request in enumerate(waiting):
            # Adapters of the next are read while there is no row for them.
            if not free and place >= self._model.slots:
                break
            if full and request.adapter is not None:
                full.append(request)
                continue
            try:
                if not self._model.reserve(request.adapter):
                    # Those behind it that need a slot wait, too, or those whose adapters are there would keep it
                    # waiting for ever.
                    full.append(request)
                elif not self._model.is_ready(request.adapter):
                    is_loading = True
                elif free:
                    # The next to be written, most often.
                    row = min(free)
                    self._model.equip(row, request.adapter)
                    free.remove(row)
                    request.row = row
                    self._reading.append(request)
                    self._leave_queue(request)
            except Exception as error:
                # What fails for one of them fails for it alone, unless everything does; where no row is free to find
                # that out, the next step of those at work does. A file that is refused tells nothing of the model.
                if free and (isinstance(error, DeviceError) or not isinstance(error, ModelError)):
                    self._health.check(min(free), error)
                self._leave_queue(request)
                request.answer.end(Failed(str(error) if isinstance(error, ModelError) else brief(error)))
        if self._waiting and not self._reading and not self._writing:
            self._give_up([] if is_loading else full)
            # For an adapter to be read, or a slot that another scheduler of the same model is to give back.
            time.sleep(_AGAIN)
        return bool(self._reading)

    def _give_up(self, full: Sequence[_Request]) -> None:
        """Of requests that find no slot, though none of these texts here has one: those that have waited for long."""
        if not full:
            self._full_since = None
            return
        now = time.monotonic()
        self._full_since = self._full_since or now
        if min(now - self._full_since, self._model.idle_seconds()) > _PATIENCE:
            self._full_since = None
            for request in full:
                self._leave_queue(request)
                request.answer.end(Failed("Others' adapters are in all slots, and none of their texts goes on."))

    def _leave_queue(self, request: _Request) -> None:
        with self._changed:
            self._waiting.remove(request)

    def _read_prompts(self) -> None:
        """A part of a prompt or several short prompts, in turns."""
        budget = self._most_read
        # Others may have come meanwhile.
        while budget > 0 and self._admit():
            most, count = min(budget, self._model.part), len(self._reading[0].unread)
            if count <= most:
                together = self._sharing(most)
                budget -= max(len(request.unread) for request in together) * len(together)
                for request in together:
                    self._begin_to_write(request)
                self._read_together(together)
            elif count <= self._model.part and budget < self._most_read:
                # The next turn reads it whole, with others.
                return
            else:
                budget -= most
                self._read_part(self._reading[0], most)
            budget -= _CALL

    def _sharing(self, most: int) -> list[_Request]:
        """The prompt whose turn it is, and those that share its call, of `most` tokens with padding: each whose padding
        costs less than a call of its own."""
        first, *others = self._reading
        together, shortest, longest = [first], len(first.unread), len(first.unread)
        for request in others if self._begins(first) else ():
            count = len(request.unread)
            least, longer = min(shortest, count), max(longest, count)
            tokens = longer * (len(together) + 1)
            allowed = longer - least <= self._model.padding and tokens <= longest * len(together) + count + _CALL
            if self._begins(request) and allowed and tokens <= most:
                together.append(request)
                shortest, longest = least, longer
        return together

    def _begins(self, request: _Request) -> bool:
        return self._model.lengths[request.row] == 0

    def _read_part(self, request: _Request, count: int) -> None:
        """More of a prompt that is not read to its end by it."""
        part, request.unread = request.unread[:count], request.unread[count:]
        if self._read(request, part) is not None:
            self._reading.rotate(-1)

    def _begin_to_write(self, request: _Request) -> None:
        row = len(self._writing)
        if request.row != row:
            self._model.swap(request.row, row)
            for other in self._reading:
                if other.row == row:
                    other.row = request.row
            request.row = row
        self._reading.remove(request)
        self._writing.append(request)

    def _read_together(self, given: Sequence[_Request]) -> None:
        """What is unread of texts in rows that are neighbours, in one call, and the next token of each."""
        requests = list(given)
        try:
            rows = self._model.read(requests[0].row, [request.unread for request in requests])
        except Exception:
            # What fails for one of them fails for it alone.
            for request in requests:
                logits = self._read(request, request.unread)
                if logits is not None:
                    self._take(request, logits)
            return
        for request, logits in zip(requests, rows, strict=True):
            self._take(request, logits)

    def _read(self, request: _Request, ids: Sequence[int]) -> np.ndarray | None:
        """The logits after more tokens of one text; None where they cannot be read, which ends the request.

        Raises:
            Broken: nor can any other's; nobody has been told yet.
        """
        try:
            return self._model.read(request.row, [ids])[0]
        except Exception as error:
            self._health.check(request.row, error)
            self._retire(request, Failed(f"{self._model.runtime} cannot run the model ({brief(error)})."))
            return None

    def _take(self, request: _Request, logits: np.ndarray) -> None:
        """The text's next token, and its end where that is one."""
        try:
            # The largest is NaN where one of them is.
            if not np.isfinite(logits.max()):
                raise Failed("The model's answer to this is no number (NaN).")
            token = request.sampler.choose(logits)
            likely = log_probability(logits, token) if request.log_probabilities else None
        except Exception as error:
            failure = error if isinstance(error, Failed) else Failed(f"No token can be chosen ({brief(error)}).")
            self._retire(request, failure)
            return
        if token in request.stops:
            self._retire(request, "stop")
            return
        request.answer.put(Token(token, likely))
        request.unread, request.left = [token], request.left - 1
        if request.left == 0:
            self._retire(request, "length")

    def _retire(self, request: _Request, how: str | Exception) -> None:
        """Its row is cleared; the last of those that are being written moves into it. Where that fails, it is still one
        of those at work, which end together."""
        self._model.clear(request.row)
        if request in self._reading:
            self._reading.remove(request)
        else:
            last = self._writing[-1]
            if last is not request:
                self._model.swap(request.row, last.row)
                self._writing[request.row], last.row = last, request.row
            self._writing.pop()
        request.answer.end(how)

    def _close(self) -> None:
        self._end_all(Failed("The server is closing."))

    def _end_all(self, how: Failed) -> None:
        try:
            for row in range(self._model.slots):
                self._model.clear(row)
        except Exception as error:
            # What a row holds would reach the next text.
            self._health.lose(error, how)
            how = Failed(self.broken)
        # Nobody comes behind this where the model is broken.
        with self._changed:
            requests = [*self._writing, *self._reading, *self._waiting]
            for held in (self._writing, self._reading, self._waiting):
                held.clear()
        for request in requests:
            self._model.release(request.adapter)
            request.answer.end(how)
