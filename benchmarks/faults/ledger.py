"""Compares the answers to clients with the rows that an independent reader finds."""

from dataclasses import dataclass, field

from .client import NOBODY_LISTENED
from .cluster import Cluster

ACCOUNTS, MONEY = 20, 1000

SCHEMA = f"""
CREATE TABLE account (id int PRIMARY KEY, balance int NOT NULL);
INSERT INTO account SELECT id, {MONEY} FROM generate_series(1, {ACCOUNTS}) AS id;

-- Nothing is unique, so that whatever is stored twice is seen twice.
CREATE TABLE entry (number int NOT NULL);
CREATE TABLE line (number int NOT NULL);
CREATE TABLE transfer (number int NOT NULL, source int, target int, amount int);

CREATE TABLE doomed (
    account int REFERENCES account DEFERRABLE INITIALLY DEFERRED  -- so that COMMIT fails
);
CREATE TABLE slow (seconds float);
CREATE FUNCTION take_time() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_sleep(NEW.seconds);
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER slow_commit AFTER INSERT ON slow
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION take_time();

CREATE TABLE dying (it int);
CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_terminate_backend(pg_backend_pid());
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER dying_commit AFTER INSERT ON dying
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION die();
"""

_RESET = f"""
SET lock_timeout = '5s';
TRUNCATE entry, line, transfer, doomed, slow, dying;
UPDATE account SET balance = {MONEY};
"""
_WRITES = """
SELECT number, count(*) FROM (SELECT number FROM entry UNION ALL SELECT number FROM transfer) AS it
GROUP BY number
"""
_HALVES = """
SELECT count(*) FROM
    (SELECT number, count(*) FROM entry GROUP BY number) AS entries
    FULL JOIN (SELECT number, count(*) FROM line GROUP BY number) AS lines USING (number, count)
WHERE entries IS NULL OR lines IS NULL
"""
_BALANCES = """
SELECT id, balance
    - coalesce((SELECT sum(amount) FROM transfer WHERE target = id), 0)
    + coalesce((SELECT sum(amount) FROM transfer WHERE source = id), 0)
FROM account
"""
_OPEN = """
SELECT count(*) FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND state <> 'idle'
"""


@dataclass
class Ledger:
    """The numbers of the writes of one period, sorted by the answers to their clients.

    Attributes:
        acknowledged: Writes with a status below 400.
        refused: Writes with a status of 400 or above, which promises that nothing was stored.
        open: Writes without an answer, or with an error while connections to the database die.
            Nobody can know if their COMMIT succeeded.
        requests: The number of all requests, reads included.
    """

    acknowledged: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    open: set[int] = field(default_factory=set)
    requests: int = 0

    def note(self, number: int, status: int | None, *, errors_leave_open: bool) -> None:
        """Record the answer to this write."""
        client_error, server_error = 400, 500
        if status == NOBODY_LISTENED:
            return
        if status is None or (status >= server_error and errors_leave_open):
            self.open.add(number)
        elif status < client_error:
            self.acknowledged.add(number)
        else:
            self.refused.add(number)


@dataclass(frozen=True)
class Finding:
    """The findings of the reader; every number except `open_stored` should be 0.

    Attributes:
        lost: Acknowledged writes that are not stored.
        twice: Writes that are stored more than once.
        phantom: Refused writes that are stored.
        half: Entries with only one of two halves, and accounts that disagree with the stored
            transfers.
        money: How much more money there is than at the start.
        open_stored: How many of the open writes are stored.
    """

    lost: int
    twice: int
    phantom: int
    half: int
    money: int
    open_stored: int


async def begin_anew(cluster: Cluster) -> None:
    """Delete all stored rows."""
    await cluster.query(_RESET)


async def compare(ledger: Ledger, cluster: Cluster) -> Finding:
    """Read the stored rows over a connection that is not the application's."""
    times = dict(await cluster.query(_WRITES))
    ((halves,),) = await cluster.query(_HALVES)
    balances = [balance for _, balance in await cluster.query(_BALANCES)]
    ((money,),) = await cluster.query("SELECT sum(balance) FROM account")
    return Finding(
        lost=len(ledger.acknowledged - times.keys()),
        twice=sum(count > 1 for count in times.values()),
        phantom=len(ledger.refused & times.keys()),
        half=halves + sum(balance != MONEY for balance in balances),
        money=int(money) - ACCOUNTS * MONEY,
        open_stored=len(ledger.open & times.keys()),
    )


async def open_transactions(cluster: Cluster) -> int:
    """Return how many sessions on the server are inside a transaction."""
    ((count,),) = await cluster.query(_OPEN)
    return int(count)
