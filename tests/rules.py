"""A model of the rules of a unit of work, written independently of the package.

It knows nothing of the package, and of SQLAlchemy only what `Transaction` says.
"""

from asyncio import CancelledError
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.exc import IntegrityError, InvalidRequestError
from typing_extensions import override

# The messages to send; the status, code or `more_body` comes from the step.
HTTP: dict[str, Any] = {
    "start": {"headers": []},
    "body": {"body": b"x"},
    "pathsend": {"path": "/tmp/x"},
    "trailers": {"headers": []},
    "early_hint": {"links": []},
    "debug": {"info": {}},
    "surprise": {},
}
SOCKET: dict[str, Any] = {
    "accept": {},
    "send": {"text": "x"},
    "close": {},
    "http.response.start": {"headers": []},
    "http.response.body": {"body": b"x"},
    "surprise": {},
}
KEYS = {
    "start": "status",
    "http.response.start": "status",
    "close": "code",
    "body": "more_body",
}


@dataclass(frozen=True)
class Step:
    """What an application does next."""

    do: str
    value: Any = None


@dataclass(frozen=True)
class Case:
    """An application, and the world around it."""

    steps: tuple[Step, ...]
    cancelled_at: int | None  # the step in which a cancellation happens
    catches: tuple[type[BaseException], ...]  # caught in each step, so that the next step runs
    client_leaves_at: int  # from this call on, `send` raises
    silence_at: int  # from this call on, `receive` raises
    apology: int | None  # the status of the response to a failed COMMIT


class Broken(Exception):
    """What the application raises."""


class Unwinds(BaseException):
    """The exception that `send` raises after a failed COMMIT; no `except Exception` catches it."""


@dataclass
class Transaction:
    """A model of the database and of SQLAlchemy, without the rules of this package.

    Rows are named after the step that wrote them, and so are the functions that are to follow.
    """

    stored: set[int] = field(default_factory=set)
    rows: set[int] = field(default_factory=set)  # written, but not stored
    objects: set[int] = field(default_factory=set)  # added, but not written
    functions: list[tuple[int, str]] = field(default_factory=list)
    due: list[tuple[int, str]] = field(default_factory=list)  # functions whose work is stored
    is_begun: bool = False
    flush_fails: bool = False
    commit_fails: bool = False
    needs_rollback: bool = False  # after a failed COMMIT or flush, only a rollback is possible

    def work(self, number: int, step: Step) -> None:
        """What an application does with its session."""
        match step.do:
            case "read" | "swallow" | "write" | "doom":
                self.statement()
                self.rows |= {number} if step.do == "write" else set()
                self.commit_fails |= step.do == "doom"
            case "add" | "add twice" | "flush":
                self.is_begun = True
                self.objects.add(number)
                self.flush_fails |= step.do == "add twice"
                if step.do == "flush":
                    self.flush()
            case "savepoint":
                self.flush()
                if step.value == "kept":
                    self.rows.add(number)
                    self.functions.append((number, "plain"))
            case "commit":
                self.commit()
            case "rollback":
                self.roll_back()

    def statement(self) -> None:
        """Begin a transaction, as any statement does."""
        self.is_begun = True
        if self.needs_rollback:
            raise InvalidRequestError

    def flush(self) -> None:
        """Write the added rows."""
        self.statement()
        if self.flush_fails:
            self.fail()
        self.rows, self.objects = self.rows | self.objects, set()

    def commit(self) -> None:
        """Store all work, or nothing."""
        if self.is_begun:
            self.flush()
            if self.commit_fails:
                self.fail()
            self.stored, self.rows, self.is_begun = self.stored | self.rows, set(), False
        self.due, self.functions = self.due + self.functions, []

    def fail(self) -> None:
        """Lose all work, and the functions that wait for it."""
        self.rows, self.objects, self.functions = set(), set(), []
        self.flush_fails, self.commit_fails, self.needs_rollback = False, False, True
        raise IntegrityError("", None, Exception())

    def roll_back(self) -> None:
        """Roll back on request; do nothing without a transaction."""
        if self.is_begun:
            begin_anew = Transaction(stored=self.stored, due=self.due)
            vars(self).update(vars(begin_anew))


@dataclass
class Expected:
    """The expected result of a case over HTTP."""

    case: Case
    is_held_back_when_cancelled: bool  # both results are right if the client leaves now
    story: list[Any] = field(default_factory=list)  # the events, and the rows stored at each event
    error: type[BaseException] | None = None

    transaction: Transaction = field(default_factory=Transaction)
    rollback: bool | None = None  # the value of `set_rollback`
    failure: type[Exception] | None = None  # the error of a COMMIT that the package sent
    is_answered: bool = False
    is_success: bool = False  # True if a normal return counts as a success
    is_held_back: bool = False
    sends: int = 0
    receives: int = 0

    @property
    def outcome(self) -> Any:
        """All observable results."""
        return self.story, self.error, self.transaction.stored

    def tell(self) -> "Expected":
        """Run all steps, and then end the case."""
        try:
            for number, step in enumerate(self.case.steps):
                try:
                    self.perform(number, step)
                except self.case.catches:
                    continue
            self.end(success=self.is_success and not self.rollback and not self.failure)
        except (Exception, CancelledError, Unwinds) as error:
            self.end(success=False)
            self.error = type(error)
        if self.failure is not None and self.error is not CancelledError:
            self.error = self.failure
            if self.case.apology is not None and not self.is_answered:
                self.apologize(self.case.apology)
        return self

    def apologize(self, status: int) -> None:
        """Return the response to a failed COMMIT if it can still be sent."""
        self.error = None
        try:
            self.forward(Step("start", status))
            self.forward(Step("body"))
        except OSError:
            self.error = OSError

    def perform(self, number: int, step: Step) -> None:
        """Run one step. A cancelled step ends the unit first, if it would do so anyway."""
        is_cancelled = number == self.case.cancelled_at or step.do == "cancel"
        self.is_held_back = is_cancelled and self.is_held_back_when_cancelled
        try:
            if step.do == "receive":
                self.receive()
            elif step.do in HTTP or step.do in SOCKET:
                self.send(step)
            elif step.do == "raise":
                raise Broken
            elif step.do == "set_rollback":
                self.rollback = step.value
            elif step.do == "on_commit":
                self.transaction.functions.append((number, step.value))
            elif not is_cancelled:
                self.transaction.work(number, step)
        finally:
            if is_cancelled:
                raise CancelledError

    def end(self, *, success: bool) -> None:
        """End the unit of work: COMMIT or ROLLBACK, and then call the waiting functions."""
        failure: type[Exception] | None = None
        try:
            if success:
                self.transaction.commit()
        except (IntegrityError, InvalidRequestError) as error:
            failure = self.failure = type(error)
        self.transaction.roll_back()
        followers = self.transaction.due
        self.transaction.due, self.transaction.functions, self.rollback = [], [], None
        for number, kind in followers:
            self.story.append(("ran", number, sorted(self.transaction.stored)))
            self.transaction.stored |= {number} if kind == "writing" else set()
        if failure is not None:
            raise Unwinds

    def send(self, message: Step) -> None:
        """HTTP: a message that acknowledges work ends the work first; other messages do not."""
        if self.failure is not None:
            raise Unwinds
        is_ending = message.do == "pathsend" or (message.do == "body" and not message.value)
        if message.do == "start" and not self.is_answered:  # the server would refuse a second start
            self.end(success=message.value < 400 if self.rollback is None else not self.rollback)
            self.is_answered = self.is_answered or not self.is_held_back
        elif is_ending and self.is_answered and not self.is_success:
            self.is_success = True
            self.end(success=not self.rollback)
        elif message.do == "trailers" and self.is_success:
            self.end(success=not self.rollback)
        self.forward(message)

    def forward(self, message: Step) -> None:
        """Deliver a message to the client, who may have disconnected."""
        if self.is_held_back:
            return
        self.sends += 1
        if self.sends >= self.case.client_leaves_at:
            raise OSError
        self.story.append((message, sorted(self.transaction.stored)))

    def receive(self) -> None:
        """HTTP: waiting for a message ends no work."""
        if self.is_held_back:
            return
        self.receives += 1
        if self.receives >= self.case.silence_at:
            raise OSError


class ExpectedOfSocket(Expected):
    """The expected result on a WebSocket: each message and each wait ends the work before it."""

    @override
    def send(self, message: Step) -> None:
        """Nothing is committed before the acceptance, after a denial, or after an error close."""
        if self.failure is not None:
            raise Unwinds
        is_denial = message.do == "http.response.start"
        if message.do == "accept":
            self.is_success = True
        elif is_denial or (message.do == "close" and message.value not in (None, 1000, 1001)):
            self.is_success = False
        if is_denial or message.do in ("accept", "send", "close"):
            self.end(success=self.is_success if self.rollback is None else not self.rollback)
        self.forward(message)

    @override
    def receive(self) -> None:
        """No connection and no open work is left while the client is silent."""
        if self.failure is not None:
            raise Unwinds
        self.end(success=not self.rollback)
        super().receive()

    @override
    def apologize(self, status: int) -> None:
        """A WebSocket has no other response."""
