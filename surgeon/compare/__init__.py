"""Methods side by side: every method trained on equal data, each in a process of its own, and one table of them all.

`contenders` has the settings that each method is recommended with, `settings` what a comparison is about, `schedule`
its runs and the folder that keeps their results, `one` a run, `peers` the same through PEFT, `rows` the table, `plots`
and `page` the web page.
"""
