"""Whether everything is in order: this machine and its packages, a backbone, prompts, a server.

Looks at what the rooms below do, and changes nothing; must not know how findings are shown, nor what serves them.
Read first: ``examine``, then ``checks``; a module for each thing that is looked at: ``packages``,
``machine``, ``model``, ``prompts``, ``server``; ``remote`` speaks HTTP.
"""
