"""What a server of a fleet hears from the database, on a thread of its own: notifications, and a beat every second.

The beat says that this server runs, and asks who else does and how many changes there were. Notifications only make it
quicker: what counts is read by revision.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import psycopg

from oracle_server.errors import OracleError
from oracle_server.state.postgres_database import CHANNEL, connect, cut

BEAT_SECONDS = 1.0
# A server that has not been heard of for so long answers nobody any more, or nobody can tell.
SILENT_SECONDS = 3.0
BACK_OFF_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)
_FORGET_SECONDS = 3600
_BEAT = """
WITH beat AS (
  INSERT INTO server (server, seen, counts) VALUES (%(server)s, clock_timestamp(), %(counts)s)
  ON CONFLICT (server) DO UPDATE SET seen = excluded.seen, counts = excluded.counts
), forgotten AS (
  DELETE FROM server WHERE seen < clock_timestamp() - make_interval(secs => %(forget)s) AND server <> %(server)s
)
SELECT (SELECT revision FROM revision) AS revision, others.server, others.counts
FROM (SELECT 1) AS one LEFT JOIN server AS others
ON others.server <> %(server)s AND others.seen > clock_timestamp() - make_interval(secs => %(silent)s)
"""


class Feed:
    """Owns the thread and its connection. `counts` is written by the event loop, read by the thread.

    The three callbacks run on the thread. `on_beat` gets the revision and the counts of the other servers by their ids,
    `on_lost` why there is no connection: once for each that is lost, and for each that cannot be made.
    """

    def __init__(
        self,
        url: Callable[[], str],
        server: str,
        *,
        on_beat: Callable[[int, Mapping[str, bytes]], object],
        on_notice: Callable[[str], object],
        on_lost: Callable[[str], object],
    ) -> None:
        self._url = url
        self._server = server
        self._on_beat = on_beat
        self._on_notice = on_notice
        self._on_lost = on_lost
        self.counts = b""
        # By time.monotonic(): when the database last answered.
        self.heard = time.monotonic()
        self._db: psycopg.Connection[Any] | None = None
        self._placing = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="replica-feed", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def interrupt(self) -> None:
        """End a connection that says nothing any more; the thread makes another."""
        with self._placing:
            if self._db is not None:
                cut(self._db)

    def stop(self) -> None:
        """End, and say that this server runs no more; blocking, for as long as a connection takes at most."""
        self._stopping.set()
        self.interrupt()
        if self._thread.ident is not None:
            self._thread.join()

    def leave(self) -> None:
        """Take this server off the list at once, so that nobody waits for it; best effort."""
        try:
            with connect(self._url) as db:
                db.execute("DELETE FROM server WHERE server = %s", (self._server,))
        except (OracleError, psycopg.Error):
            # The others notice within SILENT_SECONDS.
            pass

    def _run(self) -> None:
        tries = 0
        while not self._stopping.is_set():
            try:
                with connect(self._url) as db:
                    self._place(db)
                    db.execute(f"LISTEN {CHANNEL}")
                    while not self._stopping.is_set():
                        self._beat(db)
                        tries = 0
                        self._listen(db)
            except (OracleError, psycopg.Error) as error:
                if not self._stopping.is_set():
                    self._on_lost((str(error) or type(error).__name__).splitlines()[0])
            finally:
                self._place(None)
            self._stopping.wait(BACK_OFF_SECONDS[min(tries, len(BACK_OFF_SECONDS) - 1)])
            tries += 1

    def _beat(self, db: psycopg.Connection[Any]) -> None:
        values = {
            "server": self._server, "counts": self.counts, "forget": _FORGET_SECONDS, "silent": SILENT_SECONDS,
        }  # fmt: skip
        rows = db.execute(_BEAT, values).fetchall()
        self.heard = time.monotonic()
        self._on_beat(int(rows[0][0]), {row[1]: row[2] for row in rows if row[1] is not None})

    def _listen(self, db: psycopg.Connection[Any]) -> None:
        """Hand on what comes until the next beat is due."""
        for notice in db.notifies(timeout=BEAT_SECONDS):
            self.heard = time.monotonic()
            self._on_notice(notice.payload)

    def _place(self, db: psycopg.Connection[Any] | None) -> None:
        with self._placing:
            self._db = db
