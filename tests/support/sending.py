"""Sends one request that others prepared: whoever runs this needs no identity, and no library.

usage: python sending.py. Reads a line, JSON: the URL and its headers. Prints "200", or the reason why not.
"""

import json
import sys
import urllib.error
import urllib.request

if __name__ == "__main__":
    url, headers = json.loads(sys.stdin.readline())
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:  # noqa: S310 - the test's own
            answer.readline()
            print(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            print(json.load(error)["reason"])
