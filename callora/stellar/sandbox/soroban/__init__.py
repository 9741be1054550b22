"""The sandbox's contracts: a host that executes contracts written in Python over the ledger's entries.

`host` and `authorization` are the rules of a call, `storage` and `limits` what it may touch and pays, `contracts` the
contracts themselves. `machine` applies operations for the ledger, `simulation` answers what they would do.
"""
