"""The ground every room stands on: errors, configuration, surgery, clock, counters, receipts. Imports no torch here."""
