"""From files of counts to tokens and a corpus."""
