"""Is it still good: what is live, what it rests on, who is told when that changes.

- live.py       the credentials that have not expired, found by each fact that they rest on
- changes.py    which facts changed lately, so that nothing is recorded on what was true a moment ago
- standing.py   what operators said beside policy: denials, and permits for an emergency
- scope.py      the three together, and what was refused and suspended: what the flow asks
- refusing.py   refuses for good: here, then durably, then at guards
- suspending.py refuses until it was decided again: here and at guards, at once
- watch.py      hears of changes from attestors, policies and bundles, and of those that see no more
- deciding.py   decides again what rests on a changed fact, and suspends what that would take too long for
- case.py       what rests on one such fact, on its way through that
- feed.py       what guards are told, in the order in which it was committed
"""
